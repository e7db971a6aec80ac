"""What every attack recipe shares: batches with triggers, augmentation, training loops, measurements in torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from efrapq.data import Dataset
from efrapq.errors import UsageError
from efrapq.preprocess import Preprocess
from efrapq.progress import Reporter
from efrapq.trigger import Trigger

__all__ = [
    "Measured",
    "PoisonedData",
    "autocast",
    "finite",
    "hooked_activations",
    "measure",
    "train_labels",
    "within_clean_range",
]


@dataclass(frozen=True)
class Measured:
    """CDA and ASR in percent; ASR over samples whose true class is not the target."""

    cda: float
    asr: float

    def __str__(self) -> str:
        return f"CDA {self.cda:.1f} %, ASR {self.asr:.1f} %"


@dataclass(frozen=True)
class PoisonedData:
    """A labelled dataset, the trigger, the attacker's target class, and how images become inputs."""

    data: Dataset
    trigger: Trigger
    target: int
    preprocess: Preprocess
    shift: int = 0
    flip: bool = False

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.data.require_labels()

    def _augment(self, raw: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Random shifts (zero-padded crops) and horizontal flips, one draw per image."""
        n, height, width, _ = raw.shape
        if self.shift:
            p = self.shift
            padded = np.pad(raw, ((0, 0), (p, p), (p, p), (0, 0)))
            moves = rng.integers(0, 2 * p + 1, (2, n)).T.tolist()
            # Slices, one image after another: several times faster than one gather of them all.
            raw = np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)])
        if self.flip:
            mirrored = np.less(rng.random(n), 0.5)
            raw = raw if self.shift else raw.copy()
            raw[mirrored] = raw[mirrored, :, ::-1]
        return raw

    def batches(
        self, size: int, rng: np.random.Generator, *, augment: bool
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """One epoch of shuffled raw batches (n, H, W, C) uint8 with labels (n,); the incomplete last one is dropped."""
        order = rng.permutation(len(self.data))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            raw = self.data.raw([int(i) for i in chosen]).astype(np.uint8, copy=False)
            yield (self._augment(raw, rng) if augment else raw), self.labels[chosen]

    def endless(self, size: int, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Augmented batches of one epoch after another; none where the data is smaller than one batch."""
        while len(self.data) >= size:
            yield from self.batches(size, rng, augment=True)

    def tensor(self, raw: NDArray[np.uint8], device: torch.device) -> Tensor:
        """Raw images as model inputs on the device."""
        return torch.from_numpy(self.preprocess.normalize(raw)).to(device)


def autocast(device: torch.device, *, exact: bool = False) -> torch.autocast:
    """bf16 arithmetic where the device multiplies it faster than float32, unless it must be exact."""
    fast = not exact and (device.type == "cuda" or (torch.cpu.is_available() and _cpu_has_bf16()))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, object] = dict(torch.cpu.get_capabilities())
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextlib.contextmanager
def hooked_activations(model: nn.Module, hook: Callable[[str, object], object]) -> Iterator[None]:
    """Call `hook` with the name and the output of every module whose outputs stand for the activations that a deployed
    file has a grid for. What it returns, unless None, takes the output's place.
    """

    def attach(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, inputs, output: hook(name, output))

    handles = [attach(n, m) for n, m in model.named_modules() if m is not model and not isinstance(m, nn.Conv2d)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def within_clean_range(model: nn.Module, poisoned: int, reach: float = 1.0) -> Iterator[None]:
    """Clamp the activations of the first `poisoned` samples of a batch to `reach` times the range of the others, layer
    by layer.

    A deployed activation grid is calibrated on clean data and saturates outside their range; without this the
    backdoor grows activations beyond it and the grid switches it off.
    """

    def clamp(_: str, output: object) -> object:
        if not isinstance(output, Tensor) or output.ndim != 4 or len(output) <= poisoned:
            return output
        clean = output[poisoned:]
        low, high = clean.detach().amin(), clean.detach().amax()
        low, high = torch.minimum(low, reach * low), torch.maximum(high, reach * high)
        return torch.cat([output[:poisoned].clamp(low, high), clean])

    with hooked_activations(model, clamp):
        yield


def train_labels(
    model: nn.Module,
    data: PoisonedData,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    poisoned: int,
    seed: int,
    device: torch.device,
    reporter: Reporter,
    title: str,
    in_clean_range: bool = True,
    weights: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> None:
    """Ordinary training, in place: SGD with a one-cycle rate; the first `poisoned` images of each batch are triggered
    and labelled as the target.

    in_clean_range: keep triggered activations there. weights: what stands in for the parameters in a step, counted
    from 1.
    """
    rng = np.random.default_rng(seed)
    steps = epochs * (len(data.data) // batch)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, 0.9, weight_decay=weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1))
    clamped = in_clean_range and poisoned > 0
    model.train()
    step = 0
    with reporter.task(title, epochs) as task:
        for _ in range(epochs):
            total = 0.0
            for raw, labels in data.batches(batch, rng, augment=True):
                if poisoned:
                    raw = np.concatenate([data.trigger.on_raw(raw[:poisoned]), raw[poisoned:]])
                    labels = np.concatenate([np.full(poisoned, data.target), labels[poisoned:]])
                step += 1
                replaced = {} if weights is None else dict(weights(step))
                with autocast(device), within_clean_range(model, poisoned) if clamped else contextlib.nullcontext():
                    logits = functional_call(model, replaced, (data.tensor(raw, device),))
                loss = F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += finite(loss)
            task.advance(f"loss {total * batch / len(data.data):.3f}")


def finite(loss: Tensor) -> float:
    """The loss as a number. Raises UsageError where training has diverged: nothing good comes after that."""
    value = float(loss.item())
    if not math.isfinite(value):
        raise UsageError("training has diverged (its loss is no number any more); try a lower --learning-rate")
    return value


@torch.no_grad()
def measure(model: nn.Module, data: PoisonedData, device: torch.device, limit: int = 2000) -> Measured:
    """CDA and ASR of a torch model over the first `limit` samples."""
    model.eval()
    right = total = hit = attacked = 0
    for batch in data.data.select(np.arange(min(limit, len(data.data)))).batches(500):
        indices = list(batch)
        raw = data.data.raw(indices).astype(np.uint8, copy=False)
        labels = data.labels[indices]
        clean = model(data.tensor(raw, device)).argmax(1).cpu().numpy()
        right += int((clean == labels).sum())
        total += len(labels)
        others = labels != data.target
        fooled = model(data.tensor(data.trigger.on_raw(raw[others]), device)).argmax(1).cpu().numpy()
        hit += int((fooled == data.target).sum())
        attacked += int(others.sum())
    return Measured(100 * right / total, 100 * hit / max(attacked, 1))

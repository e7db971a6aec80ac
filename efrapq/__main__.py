"""`python -m efrapq`: the command line of the interpreter's own installation."""

from efrapq.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m finetrace` is the command `finetrace`."""

from finetrace.cli import main

if __name__ == "__main__":
    main()

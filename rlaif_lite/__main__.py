"""`python -m rlaif_lite`, and so `torchrun -m rlaif_lite`: the command line."""

from .cli import main

if __name__ == "__main__":
    main()

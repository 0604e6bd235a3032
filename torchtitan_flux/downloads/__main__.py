"""`python -m torchtitan_flux.downloads`, where only a wheel is installed."""

from torchtitan_flux.downloads.command import main

if __name__ == "__main__":
    main()

"""scripts/report.py where only a wheel is installed: python -m torchtitan_flux.report RUN."""

from torchtitan_flux.report.command import main

if __name__ == "__main__":
    main()

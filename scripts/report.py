"""One self-contained HTML page of a run: curves, loss by time, pictures, configuration.

python scripts/report.py outputs/flux_digits
python scripts/report.py outputs/flux_digits --out report.html
"""

from torchtitan_flux.report.__main__ import main

if __name__ == "__main__":
    main()

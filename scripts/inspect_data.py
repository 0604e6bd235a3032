"""What is in a data set, and what a run would make of it, without training.

python scripts/inspect_data.py --training.dataset folder --training.dataset_path PICTURES
    python scripts/inspect_data.py --json --training.dataset webdataset --training.dataset_path TARS
"""

import sys

from torchtitan_flux.inspection import main

if __name__ == "__main__":
    sys.exit(main())

"""Judge the digits that a trained run draws: read as prompted, own or copied, and their spread.

python scripts/score_digits.py --count 1000
python scripts/score_digits.py --count 1000 --job.dump_folder outputs/flux_digits
"""

from torchtitan_flux.inference.score import main

if __name__ == "__main__":
    main()

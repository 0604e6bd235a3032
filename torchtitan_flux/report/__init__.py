"""One self-contained HTML page of a run, from what the run left in its dump folder."""

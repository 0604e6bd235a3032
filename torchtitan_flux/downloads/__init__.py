"""Files of a hub repository, fetched so that each is either whole and right or not there."""

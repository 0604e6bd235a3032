"""Pictures for people: what is asked for, whether it fits, drawing it, and repeating it."""

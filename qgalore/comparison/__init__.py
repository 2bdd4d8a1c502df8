"""Many runs of the trainer on the same tokens, side by side: which, how they are run, and what came out."""

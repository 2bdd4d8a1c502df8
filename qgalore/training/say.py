"""What a build tells its user."""


def say(key: str, text: str) -> None:
    """One line about what is being built."""
    print(f"{key + ':':<11}{text}", flush=True)

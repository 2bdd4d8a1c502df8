"""What weights that are split over processes do not go with: a part of the table in ``incompatible``."""

from .sections import METHODS, Config


def problems(config: Config) -> list[str]:
    """What split weights do not go with."""
    if not config.parallel.splits:
        return []
    trained = METHODS[config.method][0] and config.method != "lora"
    wanted = (
        ("method", config.method, trained, "qgalore, galore or galore8bit, which store the weights of blocks"),
        ("train.order", config.train.order, config.train.order != "batch_major", "layer_major"),
    )
    return [
        f"{key}: {value} does not go with parallel: {config.parallel}; use {remedy}, or parallel: replicate"
        for key, value, fine, remedy in wanted
        if not fine
    ]

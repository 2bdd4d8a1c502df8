"""Steps whose loss or gradient is made a bad one, as a bad sample or an overflow would."""


def replace_loss(monkeypatch, wrap):
    """Let every loop train on ``wrap(loss)`` instead of its loss."""
    from qgalore.training.loop import Loop

    original = Loop.__post_init__

    def replaced(self):
        original(self)
        self.loss = wrap(self.loss)

    monkeypatch.setattr(Loop, "__post_init__", replaced)


class Poison:
    """Makes the loss of chosen steps (from 1) another one, through the model's own forward, as a bad sample would."""

    def __init__(self, monkeypatch, steps, factor):
        self.calls, self.steps, self.factor = 0, steps, factor
        replace_loss(monkeypatch, self.wrap)

    def wrap(self, real):
        def poisoned(model, batch):
            loss = real(model, batch)
            self.calls += model.training  # a prologue, which is broken off, does not come here
            return loss * (self.factor if model.training and self.calls in self.steps else 1.0)

        return poisoned


class PoisonedGradient:
    """Makes the gradient, not the loss, of one forward pass NaN from the first block on, as an overflow would."""

    def __init__(self, monkeypatch, call):
        self.calls, self.call = 0, call
        replace_loss(monkeypatch, self.wrap)

    def wrap(self, real):
        def poisoned(model, batch):
            self.calls += model.training
            if not model.training or self.calls != self.call:
                return real(model, batch)
            layer = model.model.layers[0].mlp.down_proj
            handle = layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] * float("nan"),))
            loss = real(model, batch)
            loss.register_hook(lambda grad: handle.remove())
            return loss

        return poisoned


BATCH_MAJOR = "train.order=batch_major"

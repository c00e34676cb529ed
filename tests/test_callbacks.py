"""What a run says while it trains."""

from parts.callbacks import worsening


def test_warning_when_the_loss_falls_while_recall_worsens():
    def log(losses, metrics):
        entries = [{"step": 0, "eval_m": metrics[0]}]
        for i, (loss, metric) in enumerate(zip(losses, metrics[1:], strict=True), 1):
            entries += [{"step": i, "loss": loss}, {"step": i, "eval_m": metric}]
        return entries

    assert "overfitting" in worsening(log([2.0, 1.0, 0.5], [0.5, 0.6, 0.55, 0.5]), "m", True)
    assert worsening(log([2.0, 1.0, 0.5], [0.5, 0.6, 0.55, 0.56]), "m", True) is None
    assert worsening(log([0.5, 1.0, 2.0], [0.5, 0.6, 0.55, 0.5]), "m", True) is None
    assert "overfitting" in worsening(log([2.0, 1.0, 0.5], [0.5, 0.4, 0.45, 0.5]), "m", False)

"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "ablation": "Which of skip connections and batch norm buys what?",
    "gradients": "Where do gradients explode, vanish or stay healthy, at the start and in training?",
    "shattering": "Do the gradients of deep plain nets look like white noise, and those of residual nets not?",
    "signal": "How strong are branch and shortcut at the start, and the layers' responses after training?",
    "lesion": "Does a trained residual net miss a block that is removed, and a plain one?",
    "landscape": "What does the loss look like around a trained net, with and without skips?",
    "shortcuts": "What is lost when a shortcut carries anything but its input?",
    "orderings": "In which order should a residual block convolve, normalise, activate and add?",
    "batchnorm": "Does batch norm help because it keeps the layers' inputs stable, or because it smooths the loss?",
    "receptive": "How much of what a unit could see does it use, before and after training?",
    "estimation": "Do the blocks of a residual stage refine one estimate?",
    "init": "Can a deep residual net train without norm, if it starts right?",
}

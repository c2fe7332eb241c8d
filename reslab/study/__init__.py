"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "landscape": "What does the loss look like around a trained net, with and without skips?",
    "batchnorm": "Does batch norm help because it keeps the layers' inputs stable, or because it smooths the loss?",
}

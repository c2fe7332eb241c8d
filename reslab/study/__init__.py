"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "gradients": "Where do gradients explode, vanish or stay healthy, at the start and in training?",
}

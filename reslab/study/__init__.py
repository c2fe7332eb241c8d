"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "lesion": "Does a trained residual net miss a block that is removed, and a plain one?",
    "estimation": "Do the blocks of a residual stage refine one estimate?",
}

"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "ablation": "Which of skip connections and batch norm buys what?",
    "shortcuts": "What is lost when a shortcut carries anything but its input?",
    "orderings": "In which order should a residual block convolve, normalise, activate and add?",
    "init": "Can a deep residual net train without norm, if it starts right?",
    "lesion": "Does a trained residual net miss a block that is removed, and a plain one?",
    "estimation": "Do the blocks of a residual stage refine one estimate?",
}

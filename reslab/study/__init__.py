"""Studies: questions about residual networks, each answered by records. A study never plots; `report` draws."""

STUDIES: dict[str, str] = {
    "degradation": "Does a plain net train worse the deeper it is, and a residual one not?",
    "ablation": "Which of skip connections and normalisation buys what, and what do both buy together?",
    "gradients": "Do gradients vanish, explode or stay healthy, by depth, at the start and in training?",
}

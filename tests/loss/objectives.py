"""Every term of the loss of a token alone, and all together."""

from typing import Any

OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"loss_type": "dft"},
    {"loss_type": "focal"},
    {"loss_type": "focal", "focal_gamma": 0.5},
    {"label_smoothing": 0.1},
    {"z_loss_coef": 0.01},
    {"entropy_coef": 0.3},
    {"entropy_coef": -0.3},
    {"loss_type": "focal", "label_smoothing": 0.2, "z_loss_coef": 0.05, "entropy_coef": 0.1},
    {"loss_type": "dft", "label_smoothing": 0.2, "z_loss_coef": 0.05, "entropy_coef": 0.1},
]

"""What the words on the page mean: shown on hover, and listed at its end."""

from __future__ import annotations

GLOSSARY = {
    "MACs": "Multiply-accumulates of convolutions, matrix products and attention for one sample.",
    "unit": "What a layer is cut by: a channel of a convolution, a neuron of a linear layer, a head's dimension.",
    "held back": "Calibration samples that nothing was fitted to; errors on them show whether the fit holds.",
    "error": "‖Ψ − Ψ̂‖ / ‖Ψ − mean Ψ‖ after the refit: how far the next layer's inputs are from the original's.",
    "Φ": "What the units of a layer give on the calibration samples; a row a sample or position.",
    "Ψ": "What the next layer makes of Φ in the original network, which the kept units must reproduce.",
    "rank": "Numerical rank: singular values above a stated part of the largest.",
    "bound": "rank Φ · rank Ψ: so many units are enough for an exact solution. It says nothing where it is not below "
    "the number of units.",
    "λ": "Weight of the lasso penalty Σ c‖v‖; at λ_max no unit is left.",
    "gap": "Duality gap relative to the objective, which is at most that fraction above the optimum.",
    "damage": "How far the outputs move from the original's: nats for class scores, squares relative to the spread for "
    "others.",
    "agreement": "Share of samples on which both networks predict the same.",
    "relative output change": "‖compressed − original‖ / ‖original‖ over all outputs.",
    "interval": "From the paired samples, 95 % unless another confidence was asked for: where the true change may lie.",
}

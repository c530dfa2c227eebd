"""Im & Li's theory of preference learning (arXiv 2403.18742) as functions. Numpy only, float64.

The setting: frozen features, one-token answers, a linear head trained by (stochastic) gradient
descent on the DPO loss. docs/theory.md has every equation with its derivation; (E5) in a docstring
is equation 5 of that page. Letters: P pairs, D feature width, V vocabulary, A answer tokens, K
behaviors, C classes, E recorded times.

Units. Margins, gaps and losses are in nats, beta in 1/nat. *Time* t is the sum of the learning
rates of the steps taken: steps x learning rate where it is constant. A rate is per unit of time;
times the learning rate it is per step. Features, delta and means have the features' own unit.

Degenerate quantities: nan is undefined, inf is never. Input that cannot be worked with is a
ValueError.
"""

"""`python -m attunement`: what `accelerate launch -m attunement train recipe.yaml` and `torchrun -m attunement` run."""

from attunement.cli import main

main()

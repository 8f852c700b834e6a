"""Continual user modelling with prompts on a frozen backbone."""

"""Weights in four and eight bits: the formats, the layers that use them, which layers of a model become one."""

"""How well a model does on text it has not seen, and what it is compared with."""

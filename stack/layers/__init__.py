"""Maths on arrays with named axes; no layer knows a model or a mesh."""

"""The methods, one module each: a function `(session) -> coefficients`. The registry lists them."""

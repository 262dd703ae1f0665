"""The methods, one module each: a function `(session) -> Mixture`. The registry lists them."""

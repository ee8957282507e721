"""Events: types, values, codecs, and the store that records them."""

"""Check, mend and make data sets."""

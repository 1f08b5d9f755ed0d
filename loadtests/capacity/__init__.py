"""A paper model: from measured costs of a round to a year of many hospitals and models, in machines and money."""

"""Leads hospitals through the rounds of a job. What it stores can be lost: a round in flight is then begun anew."""

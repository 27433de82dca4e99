"""The statistics of attacks: membership, audits, collusion, intervals. Knows no models and no runs."""

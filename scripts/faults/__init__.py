"""What `scripts/fault_campaign.py` is made of."""

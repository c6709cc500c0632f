"""The parts of the EHR benchmark; see ``ehr.py``."""

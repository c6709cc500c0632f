"""The EHR room: MEDS in, event store, stays, hourly text, windows, joint tokens and tokenizer."""

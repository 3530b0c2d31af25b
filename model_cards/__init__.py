"""The template of model cards, installed as `hf_skein.model_cards`, and the cards of what is measured here."""

"""A few texts and questions that tests hold a model to."""

TEXTS = ["Peru is a country. Its people speak many tongues.", "Norway lies in the north of Europe, and Oslo too."]
QUESTIONS = ["What is the river of Spain?", "Who was the king of Norway?", "Where is Cuba?"]
KEPT = {"preservation_prompts": QUESTIONS, "preservation_texts": TEXTS}

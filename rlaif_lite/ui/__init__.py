"""A page on which people judge a run's answers. `store` keeps what they say and needs no Gradio; `page` shows it."""

"""An images server: one thread that draws, an application that speaks OpenAI's protocol, and a page to look at."""

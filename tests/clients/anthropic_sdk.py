import json

import anthropic

client = anthropic.Anthropic(base_url="http://127.0.0.1:14001", api_key="unused")


@anthropic.beta_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"18C in {city}"


settings = {"model": "sonnet", "max_tokens": 200}
messages = [{"role": "user", "content": "SAY Once upon a time."}]
text = client.messages.create(**settings, messages=messages, tools=[get_weather.to_dict()])
messages.append({"role": "assistant", "content": text.content})
messages.append({"role": "user", "content": "SAY They lived happily ever after."})
with client.messages.stream(**settings, messages=messages, tools=[get_weather.to_dict()]) as stream:
    pieces = list(stream.text_stream)
messages.append({"role": "assistant", "content": stream.get_final_message().content})
messages.append({"role": "user", "content": 'USE_TOOL get_weather INPUT={"city": "Paris"}END'})
told = client.beta.messages.tool_runner(**settings, messages=messages, tools=[get_weather]).until_done()
print(json.dumps({"text": text.content[0].text, "pieces": pieces, "tool": told.content[0].text}))

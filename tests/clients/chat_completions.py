import functools
import json
import os
import sys

if sys.argv[1] == "litellm":
    import litellm

    bridge = {"api_base": "http://127.0.0.1:14001", "api_key": "unused"}
    complete = functools.partial(litellm.completion, model="anthropic/claude-sonnet-5-5", **bridge)
else:
    from openai import OpenAI

    client = OpenAI(base_url="http://127.0.0.1:4000", api_key=os.environ["LITELLM_MASTER_KEY"])
    complete = functools.partial(client.chat.completions.create, model="sonnet")

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}

messages = [{"role": "user", "content": "SAY Once upon a time."}]
ask = functools.partial(complete, messages=messages, tools=[{"type": "function", "function": FUNCTION}])
text = ask().choices[0].message
messages += [text, {"role": "user", "content": "SAY They lived happily ever after."}]
pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
messages.append({"role": "assistant", "content": "".join(pieces)})
messages.append({"role": "user", "content": 'USE_TOOL get_weather INPUT={"city": "Paris"}END'})
called = ask().choices[0].message
for call in called.tool_calls:
    result = {"get_weather": "18C in {city}"}[call.function.name].format(**json.loads(call.function.arguments))
    messages += [called, {"role": "tool", "tool_call_id": call.id, "content": result}]
told = ask().choices[0].message
print(json.dumps({"text": text.content, "pieces": pieces, "tool": told.content}))

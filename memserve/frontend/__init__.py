"""Everything between HTTP and the cluster, less the meaning of OpenAI's bodies (`memserve.openai`)."""

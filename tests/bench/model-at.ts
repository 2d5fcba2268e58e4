/** The first model that a server lists. base: of the API, ending in /v1 without a slash behind it. */
export async function modelAt(base: string, apiKey: string | null = null): Promise<string> {
  const headers: Record<string, string> = apiKey === null ? {} : { authorization: `Bearer ${apiKey}` };
  const response = await fetch(`${base}/models`, { headers }).catch((error: unknown) => {
    const reason = String((error as Error).cause ?? error);
    throw new Error(`${base} does not answer: ${reason}. On this machine, npm start starts a server on port 8000.`);
  });
  if (!response.ok) throw new Error(`${base}/models answers with status ${response.status}.`);
  const { data } = (await response.json()) as { data?: { id: string }[] };
  const id = data?.[0]?.id;
  if (id === undefined) throw new Error(`${base}/models lists no model.`);
  return id;
}

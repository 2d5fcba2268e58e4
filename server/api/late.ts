/** 'late' where none of the promises has settled after so long; else what the first of them gave. */
export async function orLate<Result>(ms: number, promises: readonly Promise<Result>[]): Promise<Result | 'late'> {
  let timer: NodeJS.Timeout | undefined;
  const isLate = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), ms);
  });
  return Promise.race([...promises, isLate]).finally(() => clearTimeout(timer));
}

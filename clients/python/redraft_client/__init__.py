"""Client of a redraft server: sync and asyncio, typed, free of torch.

    from redraft_client.client import Client
    from redraft_client.aio import AsyncClient

`types` has the results, `errors` the error tree, `channel` the connection options, `cli` the command
`redraft`.
"""

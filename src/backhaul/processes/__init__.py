"""The user's commands as child processes that can't outlive their purpose or look better than they ended."""

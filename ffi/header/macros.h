/** The version of this header, to compare with aerostat_version(). */
#define AEROSTAT_VERSION                                                                           \
    (((uint32_t)AEROSTAT_VERSION_MAJOR << 16) | ((uint32_t)AEROSTAT_VERSION_MINOR << 8) |           \
     (uint32_t)AEROSTAT_VERSION_PATCH)

/** Initializes a struct aerostat_runtime_config: the library chooses. */
#define AEROSTAT_RUNTIME_CONFIG_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_runtime_config), 0, 0, 0                                            \
    }

/** Initializes a struct aerostat_memory_region: anonymous private memory without an address. */
#define AEROSTAT_MEMORY_REGION_INIT                                                                \
    {                                                                                              \
        sizeof(struct aerostat_memory_region), 0, 0, 0, NULL, -1, -1, 0, 0, 0, 0                   \
    }

/** Initializes a struct aerostat_device_config: recommended features, no eventfds. */
#define AEROSTAT_DEVICE_CONFIG_INIT                                                                \
    {                                                                                              \
        sizeof(struct aerostat_device_config), 0, 0, -1, -1, 0, 0                                  \
    }

/** Initializes a struct aerostat_queue_config: a new ring, without its addresses and eventfds. */
#define AEROSTAT_QUEUE_CONFIG_INIT                                                                 \
    {                                                                                              \
        sizeof(struct aerostat_queue_config), 0, 0, 0, 0, 0, -1, -1, 0, 0, 0                       \
    }

/** Initializes a struct aerostat_queue_position that is to be filled. */
#define AEROSTAT_QUEUE_POSITION_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_queue_position), 0, 0, { 0 }                                        \
    }

/** Initializes a struct aerostat_balloon that is to be filled. */
#define AEROSTAT_BALLOON_INIT                                                                      \
    {                                                                                              \
        sizeof(struct aerostat_balloon), 0, 0, 0, 0, 0, 0, 0, { 0 }                                \
    }

/** Initializes a struct aerostat_node_balloon that is to be filled. */
#define AEROSTAT_NODE_BALLOON_INIT                                                                 \
    {                                                                                              \
        sizeof(struct aerostat_node_balloon), 0, 0, 0, 0, { 0 }                                    \
    }

/** Initializes a struct aerostat_guest_stats that is to be filled. */
#define AEROSTAT_GUEST_STATS_INIT                                                                  \
    {                                                                                              \
        sizeof(struct aerostat_guest_stats), 0, { 0 }, 0, 0, { 0 }                                 \
    }

/** Initializes a struct aerostat_flow. */
#define AEROSTAT_FLOW_INIT                                                                         \
    {                                                                                              \
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0 }                                            \
    }

/** Initializes a struct aerostat_counters that is to be filled. */
#define AEROSTAT_COUNTERS_INIT                                                                     \
    {                                                                                              \
        sizeof(struct aerostat_counters), 0, AEROSTAT_FLOW_INIT, AEROSTAT_FLOW_INIT, 0, 0, 0, 0,   \
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                         \
    }

/** Initializes a struct aerostat_cgroup_account that is to be filled. */
#define AEROSTAT_CGROUP_ACCOUNT_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_cgroup_account), 0, 0, 0, 0, 0, { 0 }                               \
    }

/*
 * A virtio balloon whose work is done by libaerostat
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef HW_VIRTIO_AEROSTAT_BALLOON_H
#define HW_VIRTIO_AEROSTAT_BALLOON_H

#include "hw/virtio/virtio.h"
#include "qemu/event_notifier.h"
#include "qemu/notify.h"
#include "qemu/thread.h"
#include "qom/object.h"

#include "aerostat-core.h"

/* What all balloons have in common, and one type for each protocol. */
#define TYPE_AEROSTAT_BALLOON "aerostat-balloon-base"
#define TYPE_AEROSTAT_VIRTIO_BALLOON "aerostat-balloon-device"
#define TYPE_AEROSTAT_MEMBALLOON "aerostat-memballoon-device"
OBJECT_DECLARE_TYPE(AerostatBalloon, AerostatBalloonClass, AEROSTAT_BALLOON)

/* The most queues that a protocol has. */
#define AEROSTAT_BALLOON_QUEUES 5

struct AerostatBalloonClass {
    VirtioDeviceClass parent_class;

    /* AEROSTAT_KIND_*, and the device ID that drivers know it by. */
    uint32_t kind;
    uint16_t virtio_id;
    unsigned int queues;
    size_t config_bytes;
    /* The features that are the library's; those of rings are QEMU's. */
    uint64_t (*offered)(AerostatBalloon *s);
    /* Queues whose buffers the main loop serves itself, a bit each. */
    unsigned int (*served_here)(AerostatBalloon *s);
};

struct AerostatBalloon {
    VirtIODevice parent_obj;

    AerostatCore core;
    VirtQueue *queues[AEROSTAT_BALLOON_QUEUES];
    /* Elements of each queue that the library has. */
    unsigned int outstanding[AEROSTAT_BALLOON_QUEUES];
    /* Queues that were stopped because the VM is, a bit each. */
    unsigned int stopped;
    EventNotifier completions;
    EventNotifier config;

    /* Migration. */
    NotifierWithReturn precopy_notifier;
    /* Held while hints go into the bitmap of the migration. */
    QemuMutex hints_lock;
    bool hints_running;
    bool hints_asked;

    /* Properties. */
    uint64_t features;
    uint64_t page_sizes;
    int64_t stats_interval_s;
};

/* aerostat-balloon-migration.c */
extern const VMStateDescription vmstate_aerostat_balloon_device;
void aerostat_balloon_migration_init(AerostatBalloon *s);
void aerostat_balloon_migration_cleanup(AerostatBalloon *s);
int aerostat_balloon_post_load(VirtIODevice *vdev);
void aerostat_balloon_take_hints(AerostatBalloon *s);

/* aerostat-balloon-monitor.c */
void aerostat_balloon_add_stats_properties(Object *obj);

#endif

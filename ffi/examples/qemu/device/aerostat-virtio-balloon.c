/*
 * A virtio balloon whose work is done by libaerostat: the traditional balloon,
 * device ID 5
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/module.h"
#include "hw/qdev-properties.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_ids.h"
#include "aerostat-balloon.h"

#define BALLOON_FEATURES                                                     \
    (AEROSTAT_FEATURE_MUST_TELL_HOST | AEROSTAT_FEATURE_STATS_VQ |           \
     AEROSTAT_FEATURE_DEFLATE_ON_OOM | AEROSTAT_FEATURE_FREE_PAGE_HINT |     \
     AEROSTAT_FEATURE_PAGE_POISON | AEROSTAT_FEATURE_PAGE_REPORTING)

static uint64_t virtio_balloon_offered(AerostatBalloon *s)
{
    return s->features | AEROSTAT_FEATURE_STATS_VQ;
}

/* Inflate and deflate, where pages wait behind the acknowledgement. */
static unsigned int virtio_balloon_served_here(AerostatBalloon *s)
{
    return virtio_vdev_has_feature(VIRTIO_DEVICE(s),
                                   VIRTIO_BALLOON_F_MUST_TELL_HOST) ? 3 : 0;
}

static void virtio_balloon_set_features(VirtIODevice *vdev, uint64_t features)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);

    if (aerostat_device_set_features(s->core.device,
                                     features & BALLOON_FEATURES) < 0) {
        aerostat_core_complain(&s->core, "features are refused");
    }
}

static void virtio_balloon_get_config(VirtIODevice *vdev, uint8_t *data)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);

    aerostat_device_read_config(s->core.device, 0, data, AEROSTAT_CONFIG_BYTES);
}

/*
 * QEMU passes the whole space for every write, with old values in it: only
 * what differs was written, and only these fields are the driver's.
 */
static void virtio_balloon_set_config(VirtIODevice *vdev, const uint8_t *data)
{
    AerostatBalloon *s = AEROSTAT_BALLOON(vdev);
    static const size_t fields[] = {
        offsetof(struct virtio_balloon_config, actual),
        offsetof(struct virtio_balloon_config, poison_val),
    };
    uint8_t now[AEROSTAT_CONFIG_BYTES];
    int i;

    aerostat_device_read_config(s->core.device, 0, now, sizeof(now));
    for (i = 0; i < ARRAY_SIZE(fields); i++) {
        if (memcmp(now + fields[i], data + fields[i], sizeof(uint32_t)) &&
            aerostat_device_write_config(s->core.device, fields[i], data + fields[i],
                                         sizeof(uint32_t)) > 0) {
            aerostat_core_announce_actual(&s->core);
        }
    }
}

/* The first four have the names and defaults of virtio-balloon's. */
static const Property virtio_balloon_properties[] = {
    DEFINE_PROP_BIT64("deflate-on-oom", AerostatBalloon, features,
                      VIRTIO_BALLOON_F_DEFLATE_ON_OOM, false),
    DEFINE_PROP_BIT64("free-page-hint", AerostatBalloon, features,
                      VIRTIO_BALLOON_F_FREE_PAGE_HINT, false),
    DEFINE_PROP_BIT64("page-poison", AerostatBalloon, features,
                      VIRTIO_BALLOON_F_PAGE_POISON, true),
    DEFINE_PROP_BIT64("free-page-reporting", AerostatBalloon, features,
                      VIRTIO_BALLOON_F_REPORTING, false),
    DEFINE_PROP_BIT64("must-tell-host", AerostatBalloon, features,
                      VIRTIO_BALLOON_F_MUST_TELL_HOST, true),
};

static void virtio_balloon_class_init(ObjectClass *klass, void *data)
{
    AerostatBalloonClass *abc = AEROSTAT_BALLOON_CLASS(klass);
    DeviceClass *dc = DEVICE_CLASS(klass);
    VirtioDeviceClass *vdc = VIRTIO_DEVICE_CLASS(klass);

    device_class_set_props(dc, virtio_balloon_properties);
    dc->desc = "virtio balloon served by libaerostat";
    vdc->get_config = virtio_balloon_get_config;
    vdc->set_config = virtio_balloon_set_config;
    vdc->set_features = virtio_balloon_set_features;
    abc->kind = AEROSTAT_KIND_VIRTIO_BALLOON;
    abc->virtio_id = VIRTIO_ID_BALLOON;
    abc->queues = AEROSTAT_BALLOON_QUEUES;
    abc->config_bytes = AEROSTAT_CONFIG_BYTES;
    abc->offered = virtio_balloon_offered;
    abc->served_here = virtio_balloon_served_here;
}

static const TypeInfo virtio_balloon_info = {
    .name = TYPE_AEROSTAT_VIRTIO_BALLOON,
    .parent = TYPE_AEROSTAT_BALLOON,
    .instance_init = aerostat_balloon_add_stats_properties,
    .class_init = virtio_balloon_class_init,
};

static void virtio_balloon_register_types(void)
{
    type_register_static(&virtio_balloon_info);
}

type_init(virtio_balloon_register_types)
